"""What training and conversion share: losses, precision, Muon, learning-rate schedules, the memory allocator."""
