"""Other people's frameworks and trackers, as they are: collected only where they are asked for."""
