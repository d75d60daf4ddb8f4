"""Requests as they come: who may send them, what they ask for, and the bytes of the media that they name."""
