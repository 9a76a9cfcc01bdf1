"""What a config is made of: kinds of values, sections, YAML, and how a problem is told."""
