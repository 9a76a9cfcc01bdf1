"""What a machine does: its rates, its floors, the cost of deciding. Nothing here trains.

Import from the modules, for example ``from slideformer.measuring.trial import random_batches``.
"""
