"""Several clips on several replicas: a queue, warm workers that are fed from it, and a record of every clip."""
