"""One encode, many live outputs: a supervised encoder, its stream cut into units, and a process for each sink."""
