"""The embedded demo: a small base model, a data set, and a run that shows every step.

examples/make_demo_base.py makes the model and the data.
"""
