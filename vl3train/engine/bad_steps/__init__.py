"""Steps whose loss or gradient norm is bad: how they are told, recorded, and left behind."""
