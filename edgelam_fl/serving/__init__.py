"""Uses a run's result: generates text, chats, exports. Knows neither processes nor how the result was trained."""
