"""What checkpoints look like on disk: config.json fields, tensor names and shapes, what runtimes accept. No torch."""
