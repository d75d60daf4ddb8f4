"""Answers over HTTP: OpenAI's chat API, and a page to talk to a model."""
