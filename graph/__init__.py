"""What must happen: tasks, buffers, graphs and the plain data types that every folder shares.

Pure Python: nothing here loads torch. Import from the modules, for example
``from slideformer.graph.tasks import Task``.
"""
