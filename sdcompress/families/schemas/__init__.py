"""What the configs of a pipeline may hold: one schema a component, checked before a library builds anything from it."""
