"""The embedded default: a small base model, a data set, and the run that shows the whole way.

Model and data are made by examples/make_demo_base.py.
"""
