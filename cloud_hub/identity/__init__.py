"""Who may speak to the broker: accounts, their passwords and certificates, and the broker's own files."""
