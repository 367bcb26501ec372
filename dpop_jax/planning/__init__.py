"""What a run would take on TPUs that are not there."""
