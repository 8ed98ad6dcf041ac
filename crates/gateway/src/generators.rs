//! Filters whose results are generators in Jinja2: they can be walked over, and that is all.
//!
//! The engine gives lists. A template that writes one as JSON fails where it was made, so it does
//! here: to show the model something else than it was trained on would be worse.

use std::sync::Arc;

use minijinja::value::ValueOrKwargs;
use minijinja::value::{Enumerator, Object, ObjectExt, ObjectRepr, Rest, Value as Jinja};
use minijinja::{Environment, Error, State, filters};

/// What these filters give. True even when empty, as in Python.
#[derive(Debug)]
struct Generator(Vec<Jinja>);

impl Object for Generator {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        self.mapped_enumerator(|this| Box::new(this.0.iter().cloned()))
    }

    fn is_true(self: &Arc<Self>) -> bool {
        true
    }
}

/// Whether a value is what one of these filters gave.
pub(crate) fn is_generator(value: &Jinja) -> bool {
    value.downcast_object_ref::<Generator>().is_some()
}

/// Puts these filters in place of the engine's.
pub(crate) fn teach(environment: &mut Environment<'static>) {
    let plain = [
        ("map", Jinja::from_function(filters::map)),
        ("select", Jinja::from_function(filters::select)),
        ("reject", Jinja::from_function(filters::reject)),
        ("selectattr", Jinja::from_function(filters::selectattr)),
        ("rejectattr", Jinja::from_function(filters::rejectattr)),
    ];
    for (name, filter) in plain {
        environment.add_filter(name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
            let list = filter.call(state, &args.into_values())?;
            let items = list.try_iter()?.collect::<Vec<_>>();
            Ok::<_, Error>(Jinja::from_object(Generator(items)))
        });
    }
}
