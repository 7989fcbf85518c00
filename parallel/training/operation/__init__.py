"""What runs of days need around their loop: checkpoints in the background, stalls, profiles, event files."""
