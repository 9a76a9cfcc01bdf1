"""Pages and pictures of a graph and its timeline."""
