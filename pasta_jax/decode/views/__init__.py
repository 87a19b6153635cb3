"""What people look at: the live view of the branches and timelines."""
