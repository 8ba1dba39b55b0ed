"""The evaluator: the paper's trade-off curve, the field's tables, sweeps and reports. docs/evaluation.md tells all."""
