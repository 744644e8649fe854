"""Parts of ``table1.py``: the detectors it counts, and the other dynamic convolutions in them."""
