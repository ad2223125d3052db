"""Inside other libraries; each module is for one, and imports it."""
