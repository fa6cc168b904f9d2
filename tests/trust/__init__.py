"""Other people's models, criteria, loops and data: a number of ours is the right one, or says that it is not."""
