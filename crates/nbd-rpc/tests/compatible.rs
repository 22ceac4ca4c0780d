//! What nodes of different versions say to each other stays understood: `/proto` may gain messages,
//! fields, values and calls, and may lose none without reserving its number.
//!
//! The newest definition that was agreed on is stored as a descriptor set
//! (`proto/cinderblock.v1.binpb`). `CINDERBLOCK_BLESS=1` stores what is there now, if it keeps to
//! the rules; a change that cannot keep to them needs a package of its own, `cinderblock.v2`.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails like the test")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use prost::Message as _;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto,
    FileDescriptorSet,
};

fn proto() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto")
}

/// What `/proto` says now, without comments.
fn now() -> FileDescriptorSet {
    let mut files: Vec<PathBuf> = fs::read_dir(proto().join("cinderblock/v1"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "proto"))
        .collect();
    files.sort();
    let mut set = protox::compile(&files, [proto()]).unwrap();
    set.file.iter_mut().for_each(|file| file.source_code_info = None);
    set
}

/// All that is said in a set, by its full name: what must stay, and what may not be used again.
#[derive(Debug, Default)]
struct Said {
    /// Messages and enumerations.
    types: BTreeMap<String, ()>,
    /// Fields by message and number; values by enumeration and number.
    members: BTreeMap<(String, i32), String>,
    /// Numbers that were given up, from and to before, by type.
    reserved: Vec<(String, i32, i32)>,
    /// Calls, with what goes in and comes out.
    calls: BTreeMap<String, String>,
}

impl Said {
    fn of(set: &FileDescriptorSet) -> Self {
        let mut said = Self::default();
        set.file.iter().for_each(|file| said.file(file));
        said
    }

    fn file(&mut self, file: &FileDescriptorProto) {
        let package = file.package().to_owned();
        file.message_type.iter().for_each(|message| self.message(&package, message));
        file.enum_type.iter().for_each(|values| self.values(&package, values));
        for service in &file.service {
            for call in &service.method {
                let stream = |is: bool| if is { "stream " } else { "" };
                let form = format!(
                    "{}{} -> {}{}",
                    stream(call.client_streaming()),
                    call.input_type(),
                    stream(call.server_streaming()),
                    call.output_type(),
                );
                self.calls.insert(format!("{package}.{}/{}", service.name(), call.name()), form);
            }
        }
    }

    fn message(&mut self, within: &str, message: &DescriptorProto) {
        let name = format!("{within}.{}", message.name());
        self.types.insert(name.clone(), ());
        for field in &message.field {
            self.members.insert((name.clone(), field.number()), form(message, field));
        }
        for range in &message.reserved_range {
            self.reserved.push((name.clone(), range.start(), range.end()));
        }
        message.nested_type.iter().for_each(|nested| self.message(&name, nested));
        message.enum_type.iter().for_each(|values| self.values(&name, values));
    }

    fn values(&mut self, within: &str, values: &EnumDescriptorProto) {
        let name = format!("{within}.{}", values.name());
        self.types.insert(name.clone(), ());
        for value in &values.value {
            self.members.insert((name.clone(), value.number()), value.name().to_owned());
        }
        for range in &values.reserved_range {
            // Of enumerations the end is part of it.
            self.reserved.push((name.clone(), range.start(), range.end() + 1));
        }
    }

    fn is_reserved(&self, name: &str, number: i32) -> bool {
        self.reserved.iter().any(|(of, start, end)| of == name && (*start..*end).contains(&number))
    }
}

/// All of a field that goes over the wire, and its name, which code is written against.
fn form(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    // A field that is optional is a choice of one, and is told by that.
    let choice = field.oneof_index.and_then(|index| usize::try_from(index).ok());
    let choice = choice.map(|index| message.oneof_decl[index].name().to_owned());
    format!(
        "{} {:?} {:?} {} {}",
        field.name(),
        field.r#type(),
        field.label(),
        field.type_name(),
        choice.unwrap_or_default(),
    )
}

/// What of `before` does not hold any more.
fn breaches(before: &Said, now: &Said) -> Vec<String> {
    let mut found = Vec::new();
    for name in before.types.keys().filter(|name| !now.types.contains_key(*name)) {
        found.push(format!("{name} is gone"));
    }
    for ((name, number), form) in &before.members {
        match now.members.get(&(name.clone(), *number)) {
            Some(now) if now == form => {}
            Some(now) => found.push(format!("{name}, {number}: was {form}, is {now}")),
            None if now.is_reserved(name, *number) || !now.types.contains_key(name) => {}
            None => found.push(format!("{name}, {number} ({form}) is gone and not reserved")),
        }
    }
    for (name, number) in now.members.keys().filter(|(name, n)| before.is_reserved(name, *n)) {
        found.push(format!("{name}, {number} is used again"));
    }
    for (name, start, end) in &before.reserved {
        if (*start..*end).any(|number| {
            !now.is_reserved(name, number) && !now.members.contains_key(&(name.clone(), number))
        }) && now.types.contains_key(name)
        {
            found.push(format!("{name}, {start} to {end}: no longer reserved"));
        }
    }
    for (name, form) in &before.calls {
        match now.calls.get(name) {
            Some(now) if now == form => {}
            Some(now) => found.push(format!("{name}: was {form}, is {now}")),
            None => found.push(format!("{name} is gone")),
        }
    }
    found
}

#[test]
fn nothing_that_was_agreed_on_has_changed() {
    let stored = proto().join("cinderblock.v1.binpb");
    let before = fs::read(&stored).unwrap_or_default();
    let before = FileDescriptorSet::decode(before.as_slice()).unwrap();
    let now = now();
    let found = breaches(&Said::of(&before), &Said::of(&now));
    assert!(found.is_empty(), "{}", found.join("\n"));
    if std::env::var_os("CINDERBLOCK_BLESS").is_some() {
        fs::write(&stored, now.encode_to_vec()).unwrap();
    } else {
        assert!(before == now, "/proto says more than is stored: CINDERBLOCK_BLESS=1 stores it");
    }
}

// Goal: the test above notices what would break old nodes.
#[test]
fn every_kind_of_breach_is_found() {
    let agreed = now();
    let noticed = |what: &str, change: &dyn Fn(&mut FileDescriptorSet)| {
        let mut changed = agreed.clone();
        change(&mut changed);
        let found = breaches(&Said::of(&agreed), &Said::of(&changed));
        assert!(!found.is_empty(), "{what} is not noticed");
    };
    fn message<'a>(set: &'a mut FileDescriptorSet, name: &str) -> &'a mut DescriptorProto {
        let mut messages = set.file.iter_mut().flat_map(|file| &mut file.message_type);
        messages.find(|message| message.name() == name).unwrap()
    }
    noticed("a message gone", &|set| {
        set.file.iter_mut().for_each(|file| file.message_type.retain(|m| m.name() != "Volume"));
    });
    noticed("a field gone", &|set| drop(message(set, "Volume").field.remove(2)));
    noticed("another type", &|set| {
        message(set, "Volume").field[2].set_type(prost_types::field_descriptor_proto::Type::Sint64)
    });
    noticed("another name", &|set| message(set, "Volume").field[2].name = Some("bytes".into()));
    noticed("another number", &|set| message(set, "Volume").field[2].number = Some(77));
    noticed("a field that is repeated", &|set| {
        message(set, "Volume").field[2]
            .set_label(prost_types::field_descriptor_proto::Label::Repeated)
    });
    noticed("a value gone", &|set| {
        let mut values = set.file.iter_mut().flat_map(|file| &mut file.enum_type);
        values.find(|values| values.name() == "Conflict").unwrap().value.pop();
    });
    noticed("a call gone", &|set| {
        let mut services = set.file.iter_mut().flat_map(|file| &mut file.service);
        services.find(|service| service.name() == "Control").unwrap().method.pop();
    });
    noticed("a call that streams", &|set| {
        let mut services = set.file.iter_mut().flat_map(|file| &mut file.service);
        let control = services.find(|service| service.name() == "Control").unwrap();
        control.method[0].server_streaming = Some(true);
    });

    // What is added, and what is given up in good order, is no breach.
    let mut changed = agreed.clone();
    let volume = message(&mut changed, "Volume");
    let gone = volume.field.remove(3).number();
    volume.reserved_range.push(prost_types::descriptor_proto::ReservedRange {
        start: Some(gone),
        end: Some(gone + 1),
    });
    let mut new = volume.field[0].clone();
    (new.name, new.number) = (Some("new".to_owned()), Some(99));
    volume.field.push(new);
    assert_eq!(breaches(&Said::of(&agreed), &Said::of(&changed)), [""; 0]);
    // ... but its number is not used again.
    assert!(!breaches(&Said::of(&changed), &Said::of(&agreed)).is_empty());
}
