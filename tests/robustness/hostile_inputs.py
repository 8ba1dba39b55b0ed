"""All generators of the campaign."""

import hostile_added
import hostile_checkpoints
import hostile_data
import hostile_more
import hostile_runs
import hostile_worlds
from spoiling import GENERATORS, Case

__all__ = ["GENERATORS", "Case"]
LOADED = (hostile_added, hostile_checkpoints, hostile_data, hostile_more, hostile_runs, hostile_worlds)
