"""When tasks run: the deciding core, its scheduler, policies, devices, stores and traces."""
