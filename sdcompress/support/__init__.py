"""What several rooms share and no model owns: settings files, the pipeline type, and silence for libraries."""
