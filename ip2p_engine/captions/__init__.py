"""From captions to (instruction, edited caption): one workflow, and the sources it can ask."""
