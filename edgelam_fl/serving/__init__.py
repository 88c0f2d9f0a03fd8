"""Uses a run's result: generates, chats, exports."""
