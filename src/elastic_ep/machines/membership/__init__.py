"""Who is in the group: views and attempts, relaunch policy, progress."""
