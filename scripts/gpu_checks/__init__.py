"""Parts of ``gpu_check.py``: arguments, the runner and its table, a file for each part, what they share."""
