"""Parts of ``train_dense.py``: arguments, data, models, steps, rates and the resume."""
