"""Score pairs of one's own with CLIP and say which pass the paper's filter.

pairs.csv has the columns before, after, caption, edited_caption; the pictures' paths start at its folder.
python score_pairs.py pairs.csv [CLIP]
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from ip2p_engine import ClipSimilarity, FilterConfig, filter_candidates


def main(table: str, clip: str = "ViT-L-14/openai") -> None:
    path = Path(table)
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    scores = ClipSimilarity.load(clip).score(
        [path.parent / row["before"] for row in rows],
        [path.parent / row["after"] for row in rows],
        [row["caption"] for row in rows],
        [row["edited_caption"] for row in rows],
    )
    kept = filter_candidates(scores, FilterConfig(keep=len(rows))).kept
    for n, (row, score) in enumerate(zip(rows, scores, strict=True)):
        word = "keep" if n in kept else "drop"
        sys.stdout.write(f"{word}  direction {score.sim_direction:.3f}  image {score.sim_image:.3f}  {row['after']}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
