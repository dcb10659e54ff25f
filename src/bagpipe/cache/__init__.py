"""The data plane: rows on the device, moved and updated as plans say. Torch; never looks at an id
while it trains.
"""
