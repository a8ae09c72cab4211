/* Any processor: vectors of four. */
#include "attention.h"
#include "products.h"

const struct operations portable_operations = {"portable", linear, feed_forward, attention};
