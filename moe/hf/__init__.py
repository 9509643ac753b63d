"""Names and files of the outside world: stock architectures, their folders, their loaders."""
