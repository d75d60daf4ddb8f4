"""Any record that users have into a Conversation."""
