"""From a config to a run that is ready for its next step: folder, data, model, engine, resume, in that order."""
