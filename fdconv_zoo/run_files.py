"""Names of the files in a run's directory that tell about it: scripts/train.py writes them, others and hub/ read."""

# Options of the command, as --config reads them.
ARGS_FILE = "args.yaml"
# Where the first weights came from: {"from": "random" | "pretrained" | "file" | "unknown", "name": ..., "repo": ...}
START_FILE = "start.json"
# The name of each output a line, as --class-map reads it.
CLASSES_FILE = "classes.txt"
# Metrics, a row an epoch.
SUMMARY_FILE = "summary.csv"
