"""What ``python -m attncore`` runs.  Nothing here is imported by ``import attncore``."""
