"""`onecard studio`: one page to prepare, watch, compare and export, served on this machine."""
