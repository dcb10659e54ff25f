"""The data plane: rows on the device, moved and updated as plans say.

It runs on torch, and never looks at an id while it trains.
"""
