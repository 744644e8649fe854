"""Parts of ``train.py``: arguments, data, the loop, validation and the log."""
