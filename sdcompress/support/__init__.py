"""What several rooms share that is about no model: settings files and quiet libraries."""
