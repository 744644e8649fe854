"""Parts of ``benchmark.py``: arguments, what is compared, a measurement, the clock, memory, tables and picture."""
