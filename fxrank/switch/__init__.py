"""The user's optimizer and averages through the switch: parameters swapped, state projected; decay and learning rate after it."""
