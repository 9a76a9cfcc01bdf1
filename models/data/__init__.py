"""Training data: from a file of text or chat records to batches of token ids and targets.

Import from the modules, for example ``from slideformer.models.data.dataset import TokenDataset``.
Nothing here copies to a device, pins memory or starts a thread.
"""
