"""Associative recall: the task, models that train side by side, and their calibration. Run by benchmark_mqar.py."""
