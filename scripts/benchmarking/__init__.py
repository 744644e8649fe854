"""Parts of ``benchmark.py``: arguments, what is compared, the clock, memory and the tables."""
