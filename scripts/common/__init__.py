"""What the rooms beside this one share; nothing here knows a room or a command."""
