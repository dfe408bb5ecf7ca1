"""What the step does not need right now leaves the device, and is back in time."""
