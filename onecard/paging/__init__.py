"""Offloading: what a step does not need leaves the device, and returns before its next use."""
