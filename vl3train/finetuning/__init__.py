"""From a file of records to a fine-tuned model: split, shards, run.yaml, training, answers, report."""
